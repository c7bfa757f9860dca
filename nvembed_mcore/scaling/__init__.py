"""What a run costs before it is started: memory, traffic, balance and time of any layout (docs/scaling.md).

Nothing here but `dry_run` imports torch, Megatron-Core or transformers: a plan answers in seconds on a laptop.
"""

"""What any cluster would do, computed on one laptop: FLOPs, bytes, memory, seconds and money of a step.

Nothing here but `dry_run` imports torch, Megatron or transformers: a plan must answer within seconds.
"""

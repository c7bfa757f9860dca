"""What `from nvembed_mcore import ...` gives, where each name comes from. Importing it takes seconds, for torch.

The list of the names is the package's own, `nvembed_mcore.__all__`.
"""

from nvembed_mcore.checkpoint.export_run import export_run as export_hf
from nvembed_mcore.checkpoint.hf_folder import WeightsError
from nvembed_mcore.checkpoint.import_run import import_hf
from nvembed_mcore.checkpoint.manifest import CheckpointError
from nvembed_mcore.cli.run_config import read_run_config
from nvembed_mcore.data.faults import DataError
from nvembed_mcore.data.records import Record, read_records, write_records
from nvembed_mcore.evaluation.embedders import Embedder, open_embedder
from nvembed_mcore.evaluation.exported import ExportedEncoder, evaluate_beir
from nvembed_mcore.evaluation.search import search_files
from nvembed_mcore.evaluation.shards import encode_file, open_shards
from nvembed_mcore.log import read_metrics
from nvembed_mcore.mining.run import Mining, mine
from nvembed_mcore.mining.select import Rules
from nvembed_mcore.train import train as train_model

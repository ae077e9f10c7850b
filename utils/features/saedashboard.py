"""SAEDashboard's files, as its NeuronpediaRunner writes them.

batch-N.json            dashboards of `PER_BATCH` features, without the dead
run_settings.json       how they were made, with the names of NeuronpediaRunnerConfig
skipped_indexes.json    the dead

Reference: sae_dashboard 0.8, neuronpedia/neuronpedia_dashboard.py, neuronpedia_runner_config.py.
"""

import itertools
import json
import math
from pathlib import Path

from utils.artifacts import replacing
from utils.features.catalogue import Catalogue
from utils.features.dashboards import Dashboard, Source, read_dashboards, shared_fields
from utils.features.examples import N_BUCKETS, N_PER_BUCKET, N_TOP
from utils.settings import Json

OUTPUTS = ("batch-*.json", "run_settings.json", "skipped_indexes.json")
PER_BATCH = 128


def write(folder: Path, catalogue: Catalogue, source: Source) -> None:
    """Write what is not there yet of a finished analysis."""
    features = catalogue.features
    dead = features["feature"][features["dead"]].tolist()
    about = {"model_id": source.model, "layer": source.layer, "sae_set": source.set_name}
    skipped = {
        **about,
        "layer": str(source.layer),
        "log_sparsity": -math.log10(catalogue.summary["n_tokens"]),  # once or more
        "skipped_indexes": dead,
    }
    _write_json(folder / "run_settings.json", _run_settings(source))
    _write_json(folder / "skipped_indexes.json", skipped)
    paths = [folder / f"batch-{k}.json" for k in range(-(-len(features) // PER_BATCH))]
    first = next((k for k, path in enumerate(paths) if not path.exists()), len(paths))
    dashboards = read_dashboards(catalogue, "exporting to SAEDashboard's", first * PER_BATCH)
    for path in paths[first:]:
        some = itertools.islice(dashboards, PER_BATCH)
        shown = [_feature(dashboard, source) for dashboard in some if dashboard.activations]
        _write_json(path, {**about, "sae_id_suffix": None, "features": shown})


def _write_json(path: Path, content: Json) -> None:
    """As theirs are: in one line."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, ensure_ascii=False, allow_nan=False), "utf-8")


def _run_settings(source: Source) -> dict[str, Json]:
    """What of NeuronpediaRunnerConfig says how these files were made."""
    return {
        "sae_set": source.set_name,
        "sae_path": "",
        "outputs_dir": ".",
        "np_sae_id_suffix": None,
        "np_set_name": source.set_name,
        "from_local_sae": True,
        "huggingface_dataset_path": source.dataset,
        "n_prompts_total": source.n_contexts,
        "n_tokens_in_prompt": source.context_length,
        "n_features_at_a_time": PER_BATCH,
        "n_quantiles": N_BUCKETS,
        "top_acts_group_size": N_TOP,
        "quantile_group_size": N_PER_BUCKET,
        "model_id": source.model,
        "layer": source.layer,
    }


def _feature(dashboard: Dashboard, source: Source) -> dict[str, Json]:
    """A feature, with the names of NeuronpediaDashboardFeature."""
    return {
        "feature_index": dashboard.feature,
        **shared_fields(dashboard),
        "n_prompts_total": source.n_contexts,
        "n_tokens_in_prompt": source.context_length,
        "dataset": source.dataset,
        "decoder_weights_dist": [],
        "activations": [
            {
                "bin_min": interval.low,
                "bin_max": interval.high,
                "bin_contains": interval.share,
                "tokens": tokens,
                "values": values,
                "qualifying_token_index": peak,
            }
            for tokens, values, peak, interval in dashboard.activations
        ],
        "vector": [],
    }

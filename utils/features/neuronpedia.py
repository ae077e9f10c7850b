"""Neuronpedia's bulk layout, which an instance of it imports.

{model}/{source}/release.jsonl, model.jsonl, sourceset.jsonl, source.jsonl      a line each
{model}/{source}/features, activations, explanations/batch-N.jsonl.gz           a line a row

Lines are rows of the tables of its database. Features of a batch are written last, and to all of
them, the dead too: a batch is there if its features are.

Reference: hijohnnylin/neuronpedia, utils/neuronpedia-utils: db_models/ and
convert-saedashboard-to-neuronpedia-export.py; apps/webapp/lib/db/import.ts reads it.
"""

import gzip
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from utils.artifacts import replacing
from utils.features.catalogue import Catalogue
from utils.features.dashboards import Activation, Dashboard, Source, read_dashboards, shared_fields
from utils.settings import Json

OUTPUTS = ("*.jsonl", "features", "activations", "explanations")
PER_BATCH = 1_024  # features in a file, as in Neuronpedia's own exports
COMPRESSION = 5
CREATOR = "clkht01d40000jv08hvalcvly"  # the user whom every instance of Neuronpedia begins with


def write(folder: Path, catalogue: Catalogue, source: Source, n_layers: int, made: str) -> None:
    """Write what is not there yet of a finished analysis.

    Args:
        folder: ``{model}/{source}``.
        n_layers: Blocks of the model.
        made: When the analysis was made, in ISO 8601.
    """
    for name, row in _about(source, catalogue.summary, n_layers, made).items():
        _write_lines(folder / f"{name}.jsonl", [row])
    n_batches = -(-len(catalogue.features) // PER_BATCH)
    batches = (k for k in range(n_batches) if not _path(folder, "features", k).exists())
    first = next(batches, n_batches)
    dashboards = read_dashboards(catalogue, "exporting to Neuronpedia's", first * PER_BATCH)
    for batch in range(first, n_batches):
        rows = {"activations": [], "explanations": [], "features": []}
        for dashboard in itertools.islice(dashboards, PER_BATCH):
            place = {"layer": source.id, "index": str(dashboard.feature), "modelId": source.model}
            rows["features"].append(_feature(dashboard, source, place, made))
            rows["activations"] += _activations(dashboard.activations, place, made)
            rows["explanations"] += _explanations(dashboard.explanation, place, made)
        for table, lines in rows.items():
            if lines:
                _write_lines(_path(folder, table, batch), lines)


def _path(folder: Path, table: str, batch: int) -> Path:
    return folder / table / f"batch-{batch}.jsonl.gz"


def _write_lines(path: Path, rows: Iterable[dict[str, Json]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as partial:
        content = text.encode()
        if path.suffix == ".gz":
            content = gzip.compress(content, COMPRESSION, mtime=0)
        partial.write_bytes(content)


def identifier(*parts: object) -> str:
    """A name for a row, of the form of Neuronpedia's; the same for the same parts."""
    return "c" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _about(
    source: Source, summary: dict[str, Json], n_layers: int, made: str
) -> dict[str, dict[str, Json]]:
    """The lines of the four files beside the tables, by name: release, model, sourceset, source."""
    words = (
        f"{summary['kind']} autoencoder of {summary['n_latents']:,} latents on the output of block "
        f"{source.layer} of {source.model_name}"
    )
    hidden = {"defaultSourceSetName": None, "defaultSourceId": None}
    by = {"creatorId": CREATOR, "createdAt": made}
    release = {
        "name": source.set_name, "description": words, "creatorName": "", **by,
        "visibility": "PUBLIC", "isNewUi": False, "featured": False, "descriptionShort": words,
        "urls": [], "creatorEmail": None, "creatorNameShort": "", **hidden,
        "defaultUmapSourceIds": [],
    }  # fmt: skip
    model = {
        "id": source.model, "instruct": "instruct" in source.model_name.lower(), **by,
        "displayNameShort": source.model, "displayName": source.model_name, "tlensId": None,
        "dimension": None, "visibility": "PUBLIC", **hidden, "inferenceEnabled": False,
        "layers": n_layers, "neuronsPerLayer": 0, "owner": "", "updatedAt": made, "website": None,
    }  # fmt: skip
    sourceset = {
        "modelId": source.model, "name": source.set_name, **by, "hasDashboards": True,
        "visibility": "PUBLIC", "description": words, "type": "", "creatorName": "", "urls": [],
        "creatorEmail": None, "releaseName": source.set_name, "defaultOfModelId": None,
        "defaultRange": 1, "defaultShowBreaks": True, "showDfa": False, "showCorrelated": False,
        "showHeadAttribution": False, "showUmap": False,
    }  # fmt: skip
    of_source = {
        "id": source.id, "modelId": source.model, "setName": source.set_name, **by,
        "hasDashboards": True, "inferenceEnabled": False, "inferenceHosts": [],
        "saelensConfig": None, "saelensRelease": None, "saelensSaeId": None, "hfRepoId": None,
        "hfFolderId": None, "visibility": "PUBLIC", "defaultOfModelId": None, "hasUmap": False,
        "hasUmapLogSparsity": False, "hasUmapClusters": False, "num_prompts": source.n_contexts,
        "num_tokens_in_prompt": source.context_length, "dataset": source.dataset, "notes": None,
    }  # fmt: skip
    return {"release": release, "model": model, "sourceset": sourceset, "source": of_source}


def _feature(
    dashboard: Dashboard, source: Source, place: dict[str, str], made: str
) -> dict[str, Json]:
    """A row of the table Neuron."""
    return {
        **place,
        "creatorId": CREATOR,
        "createdAt": made,
        "maxActApprox": dashboard.maximum,
        "hasVector": False,
        "vector": [],
        "vectorLabel": None,
        "vectorDefaultSteerStrength": 10,
        "hookName": None,
        "topkCosSimIndices": [feature for feature, _ in dashboard.neighbours],
        "topkCosSimValues": [cosine for _, cosine in dashboard.neighbours],
        **shared_fields(dashboard),
        "decoder_weights_dist": [],
        "sourceSetName": source.set_name,
    }


def _activations(
    activations: list[Activation], place: dict[str, str], made: str
) -> Iterator[dict[str, Json]]:
    """Rows of the table Activation."""
    for number, (tokens, values, peak, interval) in enumerate(activations):
        yield {
            "id": identifier("activation", *place.values(), made, number),
            "tokens": tokens,
            **place,
            "maxValue": max(values),
            "maxValueTokenIndex": values.index(max(values)),
            "minValue": min(values),
            "values": values,
            "creatorId": CREATOR,
            "dataSource": None,
            "dataIndex": None,
            "dfaValues": [],
            "dfaTargetIndex": None,
            "dfaMaxValue": None,
            "createdAt": made,
            "lossValues": [],
            "logitContributions": None,
            "binMin": interval.low,
            "binMax": interval.high,
            "binContains": interval.share,
            "qualifyingTokenIndex": peak,
            "zIndices": None,
            "zValues": None,
        }


def _explanations(text: str, place: dict[str, str], made: str) -> Iterator[dict[str, Json]]:
    """The row of the table Explanation, if there are words."""
    if text:
        yield {
            "id": identifier("explanation", *place.values(), made),
            **place,
            "description": text,
            "authorId": CREATOR,
            "embedding": None,
            "triggeredById": None,
            "typeName": None,
            "explanationModelName": None,
            "notes": None,
            "createdAt": made,
        }

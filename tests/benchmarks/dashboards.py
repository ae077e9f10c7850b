"""Check an analysis' exports with the programs that they are for, without a network.

    python -m tests.benchmarks.dashboards data/demo/analysis data/export

- SAEDashboard's own classes read batch-N.json and run_settings.json and give the same back, and its
  writer of pages makes page.html of the first features.
- With --vector, a file of influence_llm.py's SAVE_VECTOR is taken by NPVector.new.
- The package neuronpedia and this project send the same features to a server with Neuronpedia's
  rules, and the server holds the same afterwards.

Needs sae-dashboard 0.8.0, neuronpedia 1.2.1 and numpy 2, in an environment of their own: for
sae-dashboard ``transformers`` must be older than this project's.
"""

import argparse
import dataclasses
import itertools
import json
from pathlib import Path

import neuronpedia
from neuronpedia.np_activation import Activation
from neuronpedia.np_explanation import Explanation
from neuronpedia.np_feature import Feature, Logit
from neuronpedia.np_vector import NPVector
from neuronpedia.requests.base_request import NPRequest
from neuronpedia.requests.feature_request import FeatureRequest
from sae_dashboard.components import (
    ActsHistogramData,
    LogitsTableData,
    SequenceData,
    SequenceGroupData,
    SequenceMultiGroupData,
)
from sae_dashboard.components_config import (
    ActsHistogramConfig,
    Column,
    LogitsTableConfig,
    SequencesConfig,
)
from sae_dashboard.data_writing_fns import save_feature_centric_vis
from sae_dashboard.feature_data import FeatureData
from sae_dashboard.layout import SaeVisLayoutConfig
from sae_dashboard.neuronpedia.neuronpedia_dashboard import (
    NeuronpediaDashboardBatch,
    NeuronpediaDashboardFeature,
)
from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig
from sae_dashboard.sae_vis_data import SaeVisConfig, SaeVisData

from tests.neuronpedia_server import KEY, Neuronpedia, serving
from utils.embedded import public_name
from utils.features import saedashboard, upload
from utils.features.catalogue import Catalogue
from utils.features.dashboards import Source, default_set, model_id
from utils.settings import Json

N_SHOWN = 20


@dataclasses.dataclass
class Tokenizer:
    """What SAEDashboard's pages ask of a model: texts of tokens by number."""

    vocab: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def tokenizer(self) -> "Tokenizer":
        return self

    def number(self, text: str) -> int:
        return self.vocab.setdefault(text, len(self.vocab))


def read_batches(folder: Path) -> list[NeuronpediaDashboardFeature]:
    """All features of SAEDashboard's files, by its classes, which must lose nothing."""
    NeuronpediaRunnerConfig(**json.loads((folder / "run_settings.json").read_text("utf-8")))
    features = []
    for path in sorted(folder.glob("batch-*.json"), key=lambda path: int(path.stem.split("-")[1])):
        content = json.loads(path.read_text("utf-8"))
        batch = NeuronpediaDashboardBatch(**content)
        assert batch.to_dict() == content, path
        features += batch.features
    return features


def as_page(feature: NeuronpediaDashboardFeature, tokenizer: Tokenizer) -> FeatureData:
    """A feature as SAEDashboard's pages have it."""
    groups = []
    for (low, high, share), some in itertools.groupby(
        feature.activations, lambda a: (a.bin_min, a.bin_max, a.bin_contains)
    ):
        title = f"INTERVAL {low:.3f} - {high:.3f}<br>CONTAINS {share:.3%}"
        title = f"TOP ACTIVATIONS<br>MAX = {high:.3f}" if low == -1 else title
        sequences = [
            SequenceData(
                token_ids=list(map(tokenizer.number, activation.tokens)),
                feat_acts=activation.values,
                token_logits=[0.0] * len(activation.tokens),
                qualifying_token_index=activation.qualifying_token_index,
            )
            for activation in some
        ]
        groups.append(SequenceGroupData(title, sequences))
    return FeatureData(
        acts_histogram_data=ActsHistogramData(
            feature.freq_hist_data_bar_heights,
            feature.freq_hist_data_bar_values,
            title=f"ACTIVATIONS<br>DENSITY = {feature.frac_nonzero:.3%}",
        ),
        logits_table_data=LogitsTableData(
            list(map(tokenizer.number, feature.neg_str)), feature.neg_values,
            list(map(tokenizer.number, feature.pos_str)), feature.pos_values,
        ),
        sequence_data=SequenceMultiGroupData(groups),
    )  # fmt: skip


def write_page(features: list[NeuronpediaDashboardFeature], path: Path) -> None:
    """A page of features by SAEDashboard."""
    tokenizer = Tokenizer()
    tables = [LogitsTableConfig()] if features[0].pos_values else []  # none of earlier versions
    layout = SaeVisLayoutConfig(
        [Column(ActsHistogramConfig(), *tables), Column(SequencesConfig(buffer=None))]
    )
    pages = {feature.feature_index: as_page(feature, tokenizer) for feature in features}
    config = SaeVisConfig(hook_point="", features=list(pages), feature_centric_layout=layout)
    save_feature_centric_vis(SaeVisData(config, pages, model=tokenizer), path)


def sent_by_package(server: Neuronpedia, bodies: list[Json]) -> dict:
    """What the server holds after the package neuronpedia sent it these requests."""
    NPRequest.BASE_URL = f"{server.address}/api"
    for body in bodies:
        place = {"modelId": body["modelId"], "source": body["source"]}
        features = []
        for each in body["features"]:
            place["index"] = each["index"]
            logits = [[Logit(**logit) for logit in each[name]] for name in LOGITS]
            activations = [Activation(**place, **activation) for activation in each["activations"]]
            texts = [explanation["text"] for explanation in each["explanations"]]
            explanations = [Explanation(**place, text=text) for text in texts]
            features.append(Feature(**place, density=each["density"], top_logits=logits[0],
                                    bottom_logits=logits[1], explanations=explanations,
                                    activations=activations))  # fmt: skip
        FeatureRequest(KEY).upload_batch(body["modelId"], body["source"], features)
    return server.features


LOGITS = ("topLogits", "bottomLogits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("analysis", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--vector", type=Path)
    options = parser.parse_args()
    catalogue = Catalogue(options.analysis)
    about = catalogue.summary
    set_name = default_set(about["kind"], about["n_latents"])
    texts = [public_name(about[part], part) for part in ("model_name", "dataset")]
    source = Source(model_id(about["model_name"]), about["layer"], set_name, *texts, 0, 0)

    folder = options.output / "saedashboard" / source.model / source.id
    folder.mkdir(parents=True, exist_ok=True)
    saedashboard.write(folder, catalogue, source)
    features = read_batches(folder)
    write_page(features[:N_SHOWN], folder / "page.html")
    print(f"SAEDashboard reads {len(features):,} features and shows {folder / 'page.html'}.")

    bodies = [batch.body for batch in upload.read_batches(catalogue, source, "reading", 0)]
    held = []
    for send in (sent_by_package, None):
        with serving() as server:
            server.models[source.model] = source.layer + 1
            client = upload.Client(server.address, KEY)
            client.make_source(source, "a description", lambda: 0)
            if send:
                send(server, list(map(json.loads, bodies)))
            else:
                for body in bodies:
                    client.ask("feature/upload-batch", body)
            held.append(server.features)
    assert held[0] == held[1] and len(held[0]) == len(features)
    print(f"The package neuronpedia and UPLOAD leave the same {len(held[0]):,} features.")

    if options.vector:
        arguments = json.loads(options.vector.read_text("utf-8"))
        with serving() as server, neuronpedia.api_key(KEY):
            server.models[arguments["model_id"]] = arguments["layer_num"] + 1
            NPRequest.BASE_URL = f"{server.address}/api"
            made = NPVector.new(**arguments)
        assert made.values == arguments["vector"] and made.label == arguments["label"]
        print(f"NPVector.new takes {options.vector}: {made.label}, {made.hook_name}.")


if __name__ == "__main__":
    main()

"""How much longer generation takes while features are clamped: pairs of the same model, in turn.

By the clock, and by the processor's time, which on a CPU tells it on a busy machine too.

python -m tests.benchmarks.steering DEMO_FOLDER [N_PAIRS]
"""

import statistics
import sys
import time
from pathlib import Path

from utils.backend import use_backend

use_backend("torch")

from utils.features.catalogue import Catalogue  # noqa: E402
from utils.influence.generations import load_model  # noqa: E402
from utils.steering.clamps import Clamp, steered  # noqa: E402
from utils.steering.generation import generate_tokens, prompt_tokens  # noqa: E402

N_TOKENS = 60


def main(folder: Path, n_pairs: int) -> None:
    catalogue = Catalogue(folder / "analysis")
    model = load_model(catalogue, folder / "autoencoder/autoencoder.keras")
    language_model = model.language_model
    language_model.model.generation_config.eos_token_id = None  # the same length in every run
    prompts = [prompt_tokens(language_model, "My favourite food is")]
    features = catalogue.propose(3)[["feature", "max_activation"]].itertuples(index=False)
    clamps = [Clamp(int(feature), 1.0, float(maximum)) for feature, maximum in features]

    def seconds(clamps: list[Clamp]) -> tuple[float, float]:
        begun = time.perf_counter(), time.process_time()
        if clamps:
            with steered(model, clamps):
                generate_tokens(language_model, prompts, N_TOKENS)
        else:
            generate_tokens(language_model, prompts, N_TOKENS)
        return time.perf_counter() - begun[0], time.process_time() - begun[1]

    for n in (1, len(clamps)):
        seconds([]), seconds(clamps[:n])  # both once, not counted
        pairs = [(seconds([]), seconds(clamps[:n])) for _ in range(n_pairs)]
        for which, name in enumerate(("clock", "processor")):
            times = [(untouched[which], changed[which]) for untouched, changed in pairs]
            ratio = statistics.median(changed / untouched for untouched, changed in times)
            untouched, changed = (statistics.median(own) for own in zip(*times, strict=True))
            print(
                f"{n} clamped, {N_TOKENS} tokens, {n_pairs} pairs, {name}: untouched "
                f"{untouched:.3f} s, steered {changed:.3f} s; median of ratios {ratio:.3f}"
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 10)

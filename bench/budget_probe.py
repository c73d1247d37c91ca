"""bench/budget.py's linear probe, as one would script it: scikit-learn's logistic regression on frozen features.

One process. For each image size, from small to large, and for each architecture: the features of the training folder
(80 % to fit, 20 % to choose C and, later, the model), standardised; then the test images, off the clock.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from budget_clock import Clock, clock_of, files_of, parser_of

Cs = (1e-3, 1e-2, 1e-1, 1.0)
"""scikit-learn's inverse strength of the penalty: from the strongest."""
MANY_IMAGES = 2000
"""From so many on, several threads fit faster than one."""
BATCH_SIZE = 64


def decoded(files: Sequence[Path], size: int):
    """Images (n, size, size, 3), uint8: the shorter side resized, the centre cropped."""
    import numpy as np
    from PIL import Image

    images = np.empty((len(files), size, size, 3), dtype=np.uint8)

    def decode(i: int) -> None:
        with Image.open(files[i]) as image:
            image.draft("RGB", (2 * size, 2 * size))
            image = image.convert("RGB")
            scale = size / min(image.size)
            image = image.resize([max(size, round(scale * side)) for side in image.size], Image.Resampling.BILINEAR)
            left, top = ((side - size) // 2 for side in image.size)
            images[i] = image.crop((left, top, left + size, top + size))

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(decode, range(len(files))))
    return images


def backbone(arch: str, size: int, weights: Path | None):
    """A function from decoded images to their features (n, d), float32; in bf16 where the CPU has it."""
    import numpy as np
    import torch

    from trainables.network.model import build
    from trainables.network.precision import autocast_dtype
    from trainables.recipe import Recipe

    recipe = Recipe(arch=arch, image_size=size, presize=size)
    network, dtype = build(recipe, 2, weights), autocast_dtype(recipe, torch.device("cpu"))
    model = network.model.eval().to(memory_format=torch.channels_last)
    mean, std = (255 * torch.tensor(values).view(1, 3, 1, 1) for values in (network.mean, network.std))

    def features(images):
        found = []
        with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype is not None):
            for start in range(0, len(images), BATCH_SIZE):
                batch = torch.from_numpy(images[start : start + BATCH_SIZE]).permute(0, 3, 1, 2)
                maps = model.forward_features((batch - mean) / std)
                found.append(model.forward_head(maps, pre_logits=True).float().numpy())
        return np.concatenate(found)

    return features


def fit(features, labels, train, valid):
    """The logistic regression whose C is the best by validation, with its validation error and loss."""
    import copy

    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    scaler = StandardScaler().fit(features[train])
    scaled, found = scaler.transform(features), []
    regression = LogisticRegression(max_iter=1000, warm_start=True)
    with threadpool_limits(None if len(train) >= MANY_IMAGES else 1):
        for C in Cs:
            regression.set_params(C=C).fit(scaled[train], labels[train])
            error = 1 - regression.score(scaled[valid], labels[valid])
            loss = log_loss(labels[valid], regression.predict_proba(scaled[valid]), labels=regression.classes_)
            found.append((error, loss, C, copy.deepcopy(regression)))
    error, loss, C, best = min(found, key=lambda one: one[:3])
    return make_pipeline(scaler, best), {"valid_error": error, "valid_loss": loss, "C": C}


def main() -> None:
    args = parser_of(__doc__.splitlines()[0]).parse_args()
    clock: Clock = clock_of(args)
    import numpy as np

    from trainables.data.labelled_images import split

    files, test_files = files_of(args.train), files_of(args.test)
    names = sorted({file.parent.name for file in files})
    labels, test_labels = (np.array([names.index(f.parent.name) for f in each]) for each in (files, test_files))
    train, valid = split(labels, seed=args.seed)
    for size in sorted(map(int, args.sizes.split(","))):
        images = decoded(files, size)
        with clock.stopped():
            test_images = decoded(test_files, size)
        for arch in args.archs.split(","):
            features = backbone(arch, size, args.weights)
            model, found = fit(features(images), labels, train, valid)
            with clock.stopped():
                error = float(np.mean(model.predict(features(test_images)) != test_labels))
                clock.record(arch=arch, image_size=size, test_error=error, **found)


if __name__ == "__main__":
    main()

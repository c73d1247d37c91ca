"""bench/budget.py's fastai: `vision_learner(...).fine_tune` with its defaults, then at the rate that it suggests.

fine_tune(1); then `lr_find`, and with its valley as the base rate 2, 4, 8 ... epochs, each from the pretrained weights.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from budget_clock import clock_of, files_of, parser_of


def main() -> None:
    args = parser_of(__doc__.splitlines()[0]).parse_args()
    clock = clock_of(args)
    from fastai.vision import all as fastai

    from trainables.data.labelled_images import split
    from trainables.network.model import build, classifier_names
    from trainables.recipe import Recipe

    files, test_files = files_of(args.train), files_of(args.test)
    names = sorted({file.parent.name for file in files})
    train, valid = split([names.index(file.parent.name) for file in files], seed=args.seed)
    size = int(args.sizes)
    network = build(Recipe(arch=args.archs, image_size=size, presize=args.presize), len(names), args.weights)
    head = tuple(f"{name}." for name in classifier_names(network.model))
    weights = {name: value for name, value in network.model.state_dict().items() if not name.startswith(head)}
    block = fastai.DataBlock(
        blocks=(fastai.ImageBlock, fastai.CategoryBlock(vocab=names)),
        get_y=fastai.parent_label,
        splitter=fastai.IndexSplitter([int(i) for i in valid]),
        item_tfms=fastai.Resize(args.presize),
        batch_tfms=[
            *fastai.aug_transforms(size=size, min_scale=0.75),
            fastai.Normalize.from_stats(network.mean, network.std),
        ],
    )
    workers = len(os.sched_getaffinity(0))
    loaders = block.dataloaders(files, bs=min(64, len(train)), num_workers=workers)

    def new_learner() -> fastai.Learner:
        learner = fastai.vision_learner(loaders, args.archs, pretrained=False, metrics=fastai.error_rate)
        learner.model[0].model.load_state_dict(weights)
        learner.freeze()
        return learner

    fastai.set_seed(args.seed)
    epochs, rate = 1, 2e-3  # fine_tune's own
    while True:
        learner = new_learner()
        with learner.no_bar(), learner.no_logging():
            learner.fine_tune(epochs, base_lr=rate)
            valid_loss, valid_error = (float(value) for value in learner.recorder.values[-1][1:])
            with clock.stopped():
                guesses = learner.get_preds(dl=loaders.test_dl(test_files))[0].argmax(1).tolist()
                wrong = sum(names[i] != file.parent.name for i, file in zip(guesses, test_files, strict=True))
                found = {"valid_error": valid_error, "valid_loss": valid_loss, "test_error": wrong / len(test_files)}
                clock.record(arch=args.archs, image_size=size, epochs=epochs, base_lr=rate, **found)
        if epochs == 1:
            learner = new_learner()
            with learner.no_bar(), learner.no_logging():
                rate = float(learner.lr_find(show_plot=False).valley)
        epochs *= 2


if __name__ == "__main__":
    main()

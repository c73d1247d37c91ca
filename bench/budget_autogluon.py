"""bench/budget.py's AutoGluon: `MultiModalPredictor` at its defaults with one backbone, in AutoGluon's own Python.

Imports nothing of this project. Without the network, HF_HOME must name a hub's cache that has the backbone's weights.
"""

from budget_clock import clock_of, files_of, parser_of


def main() -> None:
    args = parser_of(__doc__.splitlines()[0]).parse_args()
    limit, args.seconds = args.seconds, float("inf")  # it ends itself, and what it still has to do then is its own
    clock = clock_of(args)
    import pandas
    from autogluon.multimodal import MultiModalPredictor

    train, test = (
        pandas.DataFrame([{"image": str(file), "label": file.parent.name} for file in files_of(folder)])
        for folder in (args.train, args.test)
    )
    predictor = MultiModalPredictor(
        label="label", problem_type="multiclass", path=str(args.models.parent / "autogluon")
    )
    predictor.fit(
        train,
        time_limit=max(1.0, limit - clock.seconds),
        seed=args.seed,
        hyperparameters={"model.names": ["timm_image"], "model.timm_image.checkpoint_name": args.archs},
    )
    with clock.stopped():
        error = float((predictor.predict(test).to_numpy() != test["label"].to_numpy()).mean())
        clock.record(arch=args.archs, test_error=error, valid_error=0.0, valid_loss=0.0)


if __name__ == "__main__":
    main()

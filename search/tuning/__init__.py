"""The search itself: Optuna proposes, early stopping ends trials, Ray Tune runs them."""

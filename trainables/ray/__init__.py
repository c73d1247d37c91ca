"""Training as a Ray Tune trial on warm Ray Train workers. The only room here that imports Ray."""

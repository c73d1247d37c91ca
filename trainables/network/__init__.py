"""The network and its optimisation: backbone, pretrained weights, loss, optimizer, schedule and calibration."""

"""The network and how it is optimised: backbone, pretrained weights, loss, optimizer and schedule."""

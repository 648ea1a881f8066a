"""One model on one group of devices. Knows checkpoints, tensors and collectives; knows no network, no requests and no peers."""

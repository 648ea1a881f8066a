"""The front door: takes requests, chooses nodes for them and sees each to its one terminal event. Torch-free."""

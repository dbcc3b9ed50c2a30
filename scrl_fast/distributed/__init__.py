"""Several processes that train one network: the process group, its start, and BatchNorm over all of them."""

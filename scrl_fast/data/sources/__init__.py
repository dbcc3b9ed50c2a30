"""Where images come from: folders, lists, tar shards, data sets on the hub, generated scenes, annotated sets."""

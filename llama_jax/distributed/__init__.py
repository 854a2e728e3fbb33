"""Device meshes, sharding, data parallelism and runs of several processes."""

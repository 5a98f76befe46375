"""The scene language, its renderer and its judge: what training, judging and workloads share."""

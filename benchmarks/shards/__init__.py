"""`python -m kdkernels bench shards`: what a loss over a sharded vocabulary communicates."""

"""The methods: each has its flags, network, schedule, loss and pipeline."""

"""The methods, one file each: its flags, network, schedule, loss and pipeline."""

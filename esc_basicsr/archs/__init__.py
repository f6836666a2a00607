"""The networks. They need torch and nothing else."""

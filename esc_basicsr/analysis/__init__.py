"""Looking into networks: the paper's analyses, and their kin, for any network."""

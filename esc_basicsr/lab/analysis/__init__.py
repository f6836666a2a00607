"""Attribution maps, receptive fields, similarity, features."""

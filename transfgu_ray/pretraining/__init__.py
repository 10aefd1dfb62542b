"""Pretraining of an encoder by DINO on unlabelled images."""

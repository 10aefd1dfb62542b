"""DINO pretraining (Caron et al., ICCV 2021)."""

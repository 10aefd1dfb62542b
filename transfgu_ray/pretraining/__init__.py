"""An encoder of one's own: DINO on unlabelled photographs."""

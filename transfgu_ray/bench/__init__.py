"""`transfgu bench`: the speed of each stage relative to the bare encoder, against the targets of the design."""

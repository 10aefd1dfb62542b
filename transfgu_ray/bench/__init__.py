"""`transfgu bench`: how near each stage comes to the bare encoder, against the targets of the design."""

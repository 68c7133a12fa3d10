"""The parts of fleece-qmp."""

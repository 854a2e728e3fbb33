"""From any format to any other, proven equal."""

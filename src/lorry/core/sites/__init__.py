"""Places in a model: sites, their arithmetic by kind, how weights are stored, chosen and recognised."""

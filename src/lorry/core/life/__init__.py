"""The life of an adapter on a model: made, attached, trained, fused into the base, switched, taken off."""

"""What only training a small model needs: the block `small_model` of a recipe. Nothing here is in the paper."""

"""Where models live: worker groups on Ray or in this process, and DeepSpeed inside them."""

"""What training is made of beside the network and the loss: its state, its checkpoints, and one optimiser step."""

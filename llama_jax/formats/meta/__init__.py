"""Meta's release folders: params.json and consolidated.NN.pth."""

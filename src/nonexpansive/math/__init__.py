"""The mathematics: Runge-Kutta tableaux, norm bounds, certificates. Torch and numpy alone, no files, no training."""

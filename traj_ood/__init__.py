"""traj_ood: the trajectory-to-attractor OOD score, its baselines and an OpenOOD-style benchmark."""

from traj_ood.cli import main

main()

"""What is cached and where: geometry, pools, prefix cache, op log and the drivers that execute it."""

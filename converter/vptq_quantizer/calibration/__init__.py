"""What text says of a model: its windows of tokens, and the Hessians of the layers' inputs."""

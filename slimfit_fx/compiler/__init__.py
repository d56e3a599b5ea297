"""From the graph that Dynamo captured to compiled code: the pipeline of passes, Inductor, the interpreter."""

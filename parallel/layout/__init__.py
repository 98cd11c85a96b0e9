"""Where everything is placed, in numbers only: nothing in here makes a process group."""

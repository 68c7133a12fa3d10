/*
 * The limits that the process was started with, made fit for a filesystem.
 */
#ifndef FUSEFS_LIMITS_H
#define FUSEFS_LIMITS_H

/* Raises what can be raised, and sees to it that a limit gives an error and never ends the process.
 * Before any thread is started. */
void limits_raise(void);

/* The highest number that a node's descriptor may have: the rest is for handles and for what the
 * engine opens. */
int limits_highest_node_fd(void);

#endif

/*
 * Word to a service manager.
 */
#ifndef FUSEFS_NOTIFY_H
#define FUSEFS_NOTIFY_H

/* Sends lines such as "READY=1\nSTATUS=..." to the manager that started us, as sd_notify(3) does.
 * Nothing happens where there is none; a failure is logged. Thread-safe as long as nobody changes
 * the environment. */
void notify(const char *text);

#endif

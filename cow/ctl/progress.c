/*
 * A progress bar on stderr, where that is a terminal; redrawn when it has moved by a thousandth.
 */
#include <unistd.h>

#include "cow/ctl/ctl.h"

void progress_begin(struct progress *p, double total)
{
	*p = (struct progress){.shown = isatty(STDERR_FILENO), .total = total, .drawn = -1};
}

void progress_add(struct progress *p, double amount)
{
	double part;

	p->done += amount;
	part = p->total > 0 ? p->done / p->total : 1;
	if (part > 1)
		part = 1;
	if (!p->shown || part - p->drawn < .001)
		return;
	p->drawn = part;
	fprintf(stderr, "\r%s %3.0f %%", text_bar(part, 20).s, part * 100);
	fflush(stderr);
}

void progress_clear(struct progress *p)
{
	if (!p->shown || p->drawn < 0)
		return;
	p->drawn = -1;
	fputs("\r\033[K", stderr);
	fflush(stderr);
}

/*
 * The picture of a disk, in characters and as SVG.
 *
 * A range that has anything preserved shows how much of it is, another that has lost anything shows
 * that; of others the larger part decides.
 */
#include <string.h>
#include <unistd.h>

#include "cow/ctl/ctl.h"
#include "cow/ctl/map.h"

enum kind { HOLE, UNCHANGED, SOME, HALF, MOST, GONE, KINDS };

static const struct look {
	char character;
	const char *colour; /* of the terminal */
	const char *fill;   /* of SVG */
	const char *what;
} looks[KINDS] = {
    [HOLE] = {'.', "\033[2m", "#e8e8e8", "hole"},
    [UNCHANGED] = {'-', "\033[32m", "#8fbc8f", "unchanged: read from the live disk"},
    [SOME] = {'+', "\033[33m", "#f4c27a", "preserved, less than half of it"},
    [HALF] = {'*', "\033[33m", "#e8893a", "preserved, half of it or more"},
    [MOST] = {'#', "\033[31m", "#c0392b", "preserved, all of it"},
    [GONE] = {'x', "\033[35m", "#8e6fa8", "given up, or changed and not kept: EIO"},
};

#define PLAIN "\033[0m"

static enum kind kind_of(const struct map_cell *c)
{
	if (c->preserved)
		return c->preserved == c->clusters       ? MOST
		       : c->preserved * 2 >= c->clusters ? HALF
		                                         : SOME;
	if (c->gone)
		return GONE;
	return c->hole * 2 > c->clusters ? HOLE : UNCHANGED;
}

static void totals(const struct map *m, double bytes[4])
{
	double cs = m->cluster_size;

	bytes[0] = (double)m->preserved * cs;
	bytes[1] = (double)m->hole * cs;
	bytes[2] = (double)(m->clusters - m->preserved - m->hole - m->gone) * cs;
	bytes[3] = (double)m->gone * cs;
}

void map_draw(const struct map *m)
{
	bool colours = isatty(STDOUT_FILENO);
	double bytes[4];

	totals(m, bytes);
	ctl_say("%s: %s, clusters of %s", m->title, text_size((double)m->size).s,
	        text_size(m->cluster_size).s);
	for (uint64_t i = 0; i < m->count; i++) {
		enum kind k = kind_of(&m->cells[i]);
		bool first = i % m->width == 0 || kind_of(&m->cells[i - 1]) != k;
		bool last = i % m->width == m->width - 1 || i + 1 == m->count;

		if (colours && first)
			printf("%s%s", PLAIN, looks[k].colour);
		fputc(looks[k].character, stdout);
		if (last)
			printf("%s\n", colours ? PLAIN : "");
	}
	if (m->count)
		printf("one character: %s\n",
		       text_size((double)m->clusters / (double)m->count * m->cluster_size).s);
	for (int k = 0; k < (m->gone ? KINDS : GONE); k++)
		printf("  %c  %s\n", looks[k].character, looks[k].what);
	printf("preserved %s, unchanged %s, holes %s\n", text_size(bytes[0]).s,
	       text_size(bytes[2]).s, text_size(bytes[1]).s);
	if (m->gone)
		printf("given up, or changed and not kept: %s\n", text_size(bytes[3]).s);
}

/* Text of XML, with what may not stand in it replaced. */
static void put_xml(const char *s)
{
	for (; *s; s++) {
		unsigned char c = (unsigned char)*s;

		if (c == '&')
			fputs("&amp;", stdout);
		else if (c == '<')
			fputs("&lt;", stdout);
		else if (c == '>')
			fputs("&gt;", stdout);
		else if (c < ' ' || c >= 0x7f)
			printf("\\x%02x", c);
		else
			fputc(c, stdout);
	}
}

enum { CELL = 10, LINE = 18, MARGIN = 10 };

static void svg_cell(const struct map *m, uint64_t i)
{
	const struct map_cell *c = &m->cells[i];
	unsigned __int128 from = (unsigned __int128)m->clusters * i / m->count;

	printf("<rect x=\"%llu\" y=\"%llu\" width=\"%d\" height=\"%d\" fill=\"%s\"><title>"
	       "from %llu: %llu clusters, %llu preserved, %llu holes</title></rect>\n",
	       MARGIN + (unsigned long long)(i % m->width) * CELL,
	       MARGIN + LINE + (unsigned long long)(i / m->width) * CELL, CELL, CELL,
	       looks[kind_of(c)].fill, (unsigned long long)(from * m->cluster_size),
	       (unsigned long long)c->clusters, (unsigned long long)c->preserved,
	       (unsigned long long)c->hole);
}

void map_svg(const struct map *m)
{
	unsigned long long rows = (m->count + m->width - 1) / m->width;
	unsigned long long legend = MARGIN + LINE + rows * CELL + LINE;
	unsigned long long width = (unsigned long long)m->width * CELL;
	double bytes[4];

	totals(m, bytes);
	printf("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n"
	       "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%llu\" height=\"%llu\" "
	       "font-family=\"sans-serif\" font-size=\"12\">\n",
	       2 * MARGIN + (width > 400 ? width : 400), legend + (KINDS + 1) * LINE);
	printf("<text x=\"%d\" y=\"%d\">", MARGIN, MARGIN + 8);
	put_xml(m->title);
	printf(": %s, preserved %s, unchanged %s, holes %s</text>\n", text_size((double)m->size).s,
	       text_size(bytes[0]).s, text_size(bytes[2]).s, text_size(bytes[1]).s);
	for (uint64_t i = 0; i < m->count; i++)
		svg_cell(m, i);
	for (int k = 0; k < (m->gone ? KINDS : GONE); k++) {
		printf("<rect x=\"%d\" y=\"%llu\" width=\"%d\" height=\"%d\" fill=\"%s\"/>\n",
		       MARGIN, legend + (unsigned)k * LINE, CELL, CELL, looks[k].fill);
		printf("<text x=\"%d\" y=\"%llu\">%s</text>\n", MARGIN + 2 * CELL,
		       legend + (unsigned)k * LINE + 9, looks[k].what);
	}
	fputs("</svg>\n", stdout);
}

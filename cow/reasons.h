/*
 * Why a view broke: a text for people, and a number for the header of its image.
 */
#ifndef FF_COW_REASONS_H
#define FF_COW_REASONS_H

#include <stdint.h>

#define WHY_TIMEOUT     "saving took longer than cbw-timeout"
#define WHY_NOT_DURABLE "its saved data could not be made durable"
#define WHY_REMOVED     "its source was removed, and could not be kept aside"
#define WHY_REPLACED    "its source was replaced behind the mount"
#define WHY_SMALLER     "its block device is gone, or has become smaller"
#define WHY_NO_DEVICE                                                                              \
	"its block device is not there any more, or in use by another program, or no device "      \
	"option names it"
#define WHY_GONE    "its disk is no longer in SOURCE"
#define WHY_CHANGED "its disk was changed while fleecefs was not mounted"
#define WHY_LOST    "an image that it needs is lost or damaged"
#define WHY_TWICE   "another image has its number: a copy, or one that was moved away and back"
#define WHY_ABSENT                                                                                 \
	"its snapshot was not there during an earlier mount, and lacks what was changed then"
#define WHY_POWER "power failed before it was durable"
#define WHY_UNMOUNTED                                                                              \
	"a filesystem failed, or was unmounted after fleecefs was killed, before it was durable"
#define WHY_NOTED "old data could not be saved, or its image was missing, during an earlier mount"

/* The text, which is static, of an error of a save. */
const char *reason_of_error(int error);
/* The number of a text, one of the above or of an error; 0: it has none. */
uint8_t reason_number(const char *why);
/* The text of a number, which may come from anywhere. Static. */
const char *reason_text(uint8_t number);

#endif

/* Print the most frequent words on standard input; words with the same count in alphabetical order. */
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BUCKETS = 1 << 16, MAX_LENGTH = 63, MAX_WORDS = 20 };

struct word {
    struct word *next;
    unsigned long count;
    char text[];
};

static struct word *buckets[BUCKETS];
static size_t words;

static void count(const char *text, size_t length)
{
    unsigned hash = 2166136261u;
    for (size_t i = 0; i < length; i++)
        hash = (hash ^ (unsigned char)text[i]) * 16777619u;
    struct word **slot = &buckets[hash % BUCKETS];
    for (struct word *word = *slot; word; word = word->next)
        if (strcmp(word->text, text) == 0) {
            word->count++;
            return;
        }
    struct word *word = malloc(sizeof *word + length + 1);
    if (!word) {
        perror("malloc");
        exit(1);
    }
    memcpy(word->text, text, length + 1);
    word->count = 1;
    word->next = *slot;
    *slot = word;
    words++;
}

static int by_count(const void *a, const void *b)
{
    const struct word *x = *(struct word *const *)a, *y = *(struct word *const *)b;
    if (x->count != y->count)
        return x->count < y->count ? 1 : -1;
    return strcmp(x->text, y->text);
}

int main(void)
{
    char text[MAX_LENGTH + 1];
    size_t length = 0;
    for (int c; (c = getchar()) != EOF;) {
        if (isalpha(c)) {
            if (length < MAX_LENGTH)
                text[length++] = (char)tolower(c);
        } else if (length) {
            text[length] = '\0';
            count(text, length);
            length = 0;
        }
    }
    if (length) {
        text[length] = '\0';
        count(text, length);
    }
    struct word **all = malloc(words * sizeof *all + 1);
    if (!all) {
        perror("malloc");
        return 1;
    }
    size_t filled = 0;
    for (size_t i = 0; i < BUCKETS; i++)
        for (struct word *word = buckets[i]; word; word = word->next)
            all[filled++] = word;
    qsort(all, filled, sizeof *all, by_count);
    for (size_t i = 0; i < filled && i < MAX_WORDS; i++)
        printf("%7lu %s\n", all[i]->count, all[i]->text);
    return 0;
}

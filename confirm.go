package main

import (
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"hash/crc32"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// An asker is the browser that asked for a ticket. The phone shows it before it
// confirms, so that whoever was handed a stranger's code sees that it is not their own.
type asker struct {
	Browser string // and system, such as "Firefox, Windows"
	Address string
}

// asker returns the browser that makes a request, or nothing unless logins must
// be confirmed.
func (s *server) asker(r *http.Request) asker {
	if !s.config.confirm {
		return asker{}
	}
	first := func(fallback string, pairs ...string) string { // of a mark in the User-Agent, and its meaning
		for pair := range slices.Chunk(pairs, 2) {
			if strings.Contains(r.UserAgent(), pair[0]) {
				return pair[1]
			}
		}
		return fallback
	}
	// Most browsers claim to be Chrome and Safari too: these come last.
	browser := first("Other", "MicroMessenger", "WeChat", "QQBrowser", "QQ", "QQ/", "QQ", "Quark", "Quark",
		"UCBrowser", "UC", "UBrowser", "UC", "QihooBrowser", "360", "360SE", "360", "360EE", "360",
		"MetaSr", "Sogou", "SogouM", "Sogou", "baidu", "Baidu", "HuaweiBrowser", "Huawei", "MiuiBrowser", "Xiaomi",
		"VivoBrowser", "vivo", "HeyTapBrowser", "OPPO", "SamsungBrowser", "Samsung", "Edg", "Edge", "OPR/", "Opera",
		"Firefox", "Firefox", "FxiOS", "Firefox", "Chrome", "Chrome", "CriOS", "Chrome", "Safari", "Safari",
		"curl", "curl")
	system := first("", "Harmony", ", HarmonyOS", "Android", ", Android", "iPhone", ", iPhone", "iPad", ", iPad",
		"Windows", ", Windows", "Mac OS", ", macOS", "CrOS", ", ChromeOS", "Linux", ", Linux")
	return asker{Address: client(r, s.config.trusted).String(), Browser: browser + system}
}

// holdBack is how long the phone's page must have been shown before its answer
// counts: a fast tap was meant for the page before it.
const holdBack = time.Second

// number returns the two digits that the login page shows, for the phone to choose.
func number(k key) string {
	return strconv.Itoa(10 + int(crc32.ChecksumIEEE(k[:])%90))
}

// choices returns the three numbers that the phone chooses from. They follow from
// the s of the confirmURL: so every look shows the same, and whoever asked for the
// ticket cannot know where the right one will stand.
func choices(k key, sent string) []string {
	random := rand.New(rand.NewChaCha8(sha256.Sum256([]byte(sent))))
	numbers := []string{number(k)}
	for len(numbers) < 3 {
		if n := strconv.Itoa(10 + random.IntN(90)); !slices.Contains(numbers, n) {
			numbers = append(numbers, n)
		}
	}
	random.Shuffle(len(numbers), func(i, j int) { numbers[i], numbers[j] = numbers[j], numbers[i] })
	return numbers
}

// confirmURL returns where the phone confirms the login of the ticket with key k.
func (s *server) confirmURL(k key, ticket record) string {
	secret := s.confirmSecret(k, ticket, s.config.sessionSecrets[0])
	return s.config.publicURL + "/wechat/confirm?s=" + k.String() + secret
}

// confirmSecret returns what the phone alone knows: whoever holds it may decide about
// the login. It is a MAC of ticket and person, so that it need not be kept.
func (s *server) confirmSecret(k key, ticket record, sessionSecret string) string {
	return hex.EncodeToString(mac(sessionSecret, "confirm "+k.String()+" "+ticket.Login.OpenID)[:16])
}

// toConfirm returns the ticket that the s of a confirmURL decides about. If s is not
// valid, or the ticket does not wait for a decision, why is no login.
func (s *server) toConfirm(ctx context.Context, sent string) (k key, ticket record, why outcome) {
	id := sent[:min(len(sent), 2*len(k))]
	k = parseKey(id)
	ticket, err := s.tickets.look(ctx, k)
	isRight := slices.ContainsFunc(s.config.sessionSecrets, func(sessionSecret string) bool {
		return hmac.Equal([]byte(sent[len(id):]), []byte(s.confirmSecret(k, ticket, sessionSecret)))
	})
	switch {
	case err != nil:
		return k, ticket, outcomeUnavailable
	case ticket.Status != statusScanned, !isRight:
		return k, ticket, outcomeExpired
	}
	return k, ticket, outcomeNone
}

// showConfirm shows the phone what it is about to log in. It changes nothing, so
// that a preview of the link does no harm.
func (s *server) showConfirm(w http.ResponseWriter, r *http.Request) error {
	sent := r.URL.Query().Get("s")
	k, ticket, why := s.toConfirm(r.Context(), sent)
	if why != outcomeNone {
		return phoneFailed(w, r, why)
	}
	numbers := choices(k, sent)
	return s.config.writePage(w, http.StatusOK, "static/html/confirm.html",
		"Site", s.config.site(), "Host", originOf(s.config.publicURL).Host,
		"First", numbers[0], "Second", numbers[1], "Third", numbers[2],
		"Secret", sent, "Shown", strconv.FormatInt(time.Now().UnixMilli(), 10),
		"Browser", ticket.Asker.Browser, "Address", cmp.Or(ticket.Asker.Address, "?"))
}

// takeAnswer takes the phone's answer, which counts once: the right number logs in;
// either of the others, or "no", declines. An answer that comes too soon, or is
// none of these, decides nothing: the page is shown again.
func (s *server) takeAnswer(w http.ResponseWriter, r *http.Request) error {
	r.Body = http.MaxBytesReader(w, r.Body, maxBody)
	sent, answer := r.PostFormValue("s"), r.PostFormValue("answer")
	k, _, why := s.toConfirm(r.Context(), sent)
	if why != outcomeNone {
		return phoneFailed(w, r, why)
	}
	shown, malformed := strconv.ParseInt(r.PostFormValue("shown"), 10, 64)
	isSoon := malformed != nil || time.Since(time.UnixMilli(shown)) < holdBack
	if isSoon || answer != "no" && !slices.Contains(choices(k, sent), answer) {
		http.Redirect(w, r, "/wechat/confirm?s="+sent, http.StatusSeeOther)
		return nil
	}
	decided, err := s.tickets.decide(r.Context(), k, answer == number(k))
	switch {
	case err != nil:
		return phoneFailed(w, r, outcomeUnavailable)
	case !decided:
		return phoneFailed(w, r, outcomeExpired)
	case answer == "no":
		return phoneFailed(w, r, outcomeDeclined)
	case answer != number(k):
		return phoneFailed(w, r, outcomeNumber)
	}
	return phoneSucceeded(w, r)
}

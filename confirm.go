package main

import (
	"cmp"
	"context"
	"crypto/hmac"
	"encoding/hex"
	"hash/crc32"
	"net/http"
	"strconv"
	"strings"
)

// An asker is the browser that asked for a ticket, as the phone is told before
// it confirms: who is shown a code by a stranger can see that it is not their own.
type asker struct {
	Browser string // and system, such as "Firefox, Windows"
	Address string
}

// asker returns who makes a request, by its User-Agent and address; nothing
// unless logins are to be confirmed.
func (s *server) asker(r *http.Request) asker {
	if !s.config.confirm {
		return asker{}
	}
	first := func(names ...string) string { // pairs: what the agent says, what it means
		for i := 0; i < len(names); i += 2 {
			if strings.Contains(r.UserAgent(), names[i]) {
				return names[i+1]
			}
		}
		return "?"
	}
	address, _ := client(r, s.config.trusted)
	return asker{Address: address,
		Browser: first("MicroMessenger", "WeChat", "Edg", "Edge", "OPR/", "Opera", "Firefox", "Firefox", "Chrome", "Chrome", "Safari", "Safari", "curl", "curl") + ", " +
			first("Android", "Android", "iPhone", "iPhone", "iPad", "iPad", "Windows", "Windows", "Mac OS", "macOS", "CrOS", "ChromeOS", "Linux", "Linux")}
}

// number returns the two digits that stand on the asker's page and on the phone.
func number(key key) string {
	return strconv.Itoa(10 + int(crc32.ChecksumIEEE(key[:])%90))
}

// confirmURL returns where the phone confirms the login that a ticket, by its
// key, waits for.
func (s *server) confirmURL(k key, ticket record) string {
	return s.config.publicURL + "/wechat/confirm?s=" + k.String() + s.confirmSecret(k, ticket, s.config.sessionSecrets[0])
}

// confirmSecret returns what the phone alone knows, to decide about a login: a
// MAC of ticket and person, so that nothing need be kept.
func (s *server) confirmSecret(k key, ticket record, sessionSecret string) string {
	return hex.EncodeToString(mac(sessionSecret, "confirm "+k.String()+" "+ticket.Login.OpenID)[:16])
}

// toConfirm returns the ticket that the s of a confirmURL may decide about. ok is
// false if there is none, or it waits for no decision.
func (s *server) toConfirm(ctx context.Context, sent string) (k key, ticket record, ok bool, err error) {
	id := sent[:min(len(sent), 2*len(k))]
	k = parseKey(id)
	ticket, err = s.tickets.look(ctx, k)
	if err != nil || ticket.Status != statusScanned {
		return k, ticket, false, err
	}
	for _, sessionSecret := range s.config.sessionSecrets { // the one before, where it is being changed
		ok = hmac.Equal([]byte(sent[len(id):]), []byte(s.confirmSecret(k, ticket, sessionSecret))) || ok
	}
	return k, ticket, ok, nil
}

// askPhone shows the phone what it is about to log in. It changes nothing, so
// that a preview of the link does no harm.
func (s *server) askPhone(w http.ResponseWriter, r *http.Request) error {
	sent := r.URL.Query().Get("s")
	k, ticket, ok, err := s.toConfirm(r.Context(), sent)
	if err != nil {
		return err
	}
	if !ok {
		http.Redirect(w, r, "/static/html/loginfailed.html?reason=expired", http.StatusSeeOther)
		return nil
	}
	return writePage(w, http.StatusOK, "static/html/confirm.html", "Site", site(s.config.publicURL).Host, "Number", number(k), "Secret", sent,
		"Browser", ticket.Asker.Browser, "Address", cmp.Or(ticket.Asker.Address, "?"))
}

// hearPhone takes the phone's answer. It counts once.
func (s *server) hearPhone(w http.ResponseWriter, r *http.Request) error {
	r.Body = http.MaxBytesReader(w, r.Body, maxBody)
	yes := r.PostFormValue("answer") == "yes"
	k, _, ok, err := s.toConfirm(r.Context(), r.PostFormValue("s"))
	if ok && err == nil {
		ok, err = s.tickets.decide(r.Context(), k, yes)
	}
	if err != nil {
		return err
	}
	target := "/static/html/loginsucceed.html"
	if !ok {
		target = "/static/html/loginfailed.html?reason=expired"
	} else if !yes {
		target = "/static/html/loginfailed.html?reason=declined"
	}
	http.Redirect(w, r, target, http.StatusSeeOther)
	return nil
}

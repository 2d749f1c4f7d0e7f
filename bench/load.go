//go:build ignore

// The parts of bench/load.sh that wrk cannot play:
//
//	load floor ADDR        a bare net/http handler that answers a poll's bytes
//	load tickets N URL     ask for N tickets of flow B
//	load park N URL        park N polls, 8 on a ticket and 200 from an address, print "parked",
//	                       keep them until stdin ends
//	load scan N URL        N logins by flow A: print the median and the 99th
//	                       percentile from the scan's request to the browser's answer, in ms
//	load push N PID URL    N signed SCAN pushes: print how many per second of PID's CPU
//	load qr N PID URL      N tickets of flow B and their pictures: print the ms of PID's CPU for each
//	load first ADDR CMD…   start CMD, print the ms until ADDR answers, then stop it
package main

import (
	"bufio"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "load:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch n, _ := strconv.Atoi(args[1]); args[0] {
	case "floor":
		return floor(args[1])
	case "tickets":
		return tickets(n, args[2])
	case "park":
		return park(n, args[2])
	case "scan":
		return scan(n, args[2])
	case "push":
		return push(n, args[2], args[3])
	case "qr":
		return qr(n, args[2], args[3])
	case "first":
		return first(args[1], args[2:])
	}
	return fmt.Errorf("unknown part %q", args[0])
}

// floor parks a poll that has wait=, as wxscan does, and answers any other at once.
func floor(addr string) error {
	// The spaces are as long as the headers that wxscan sends besides.
	body := []byte("{\"login\":false,\"status\":\"pending\",\"expiresIn\":300}\n" + strings.Repeat(" ", 170))
	return http.ListenAndServe(addr, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.RawQuery, "wait=") {
			<-r.Context().Done()
		}
		w.Header().Set("Content-Type", "application/json")
		w.Write(body)
	}))
}

// together runs work on n connections, and returns an error if one has any.
func together(n int, base string, work func(conn net.Conn, in *bufio.Reader) error) error {
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			conn, err := net.Dial("tcp", strings.TrimPrefix(base, "http://"))
			if err == nil {
				err = work(conn, bufio.NewReader(conn))
				conn.Close()
			}
			errs[i] = err
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// answer reads an answer whole.
func answer(in *bufio.Reader) (string, error) {
	resp, err := http.ReadResponse(in, nil)
	if err != nil {
		return "", err
	}
	body, err := io.ReadAll(resp.Body)
	return string(body), err
}

func tickets(n int, base string) error {
	const clients, batch = 4, 50
	return together(clients, base, func(conn net.Conn, in *bufio.Reader) error {
		for done := 0; done < n/clients; done += batch {
			io.WriteString(conn, strings.Repeat("GET /wechat/getauthqr HTTP/1.1\r\nHost: x\r\n\r\n", batch))
			for range batch {
				if _, err := answer(in); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

func park(n int, base string) error {
	u, err := url.Parse(base)
	if err != nil {
		return err
	}
	pid := os.Getpid()
	var qr struct{ Ticket string }
	for i := range n { // from addresses of its own: one has 28,000 ports, and those of the last run are not free yet
		if i%8 == 0 {
			if err := ask("GET", base+"/wechat/getauthqr", &qr); err != nil {
				return err
			}
		}
		dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, byte(pid>>8), byte(pid), byte(2+i/10000))}}
		conn, err := dialer.Dial("tcp", u.Host)
		if err != nil {
			return err
		}
		defer conn.Close()
		fmt.Fprintf(conn,
			"GET /wechat/checklogin?wait=30&ticket=%s HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 198.51.%d.%d\r\n\r\n",
			qr.Ticket, i/200/200, i/200%200)
	}
	time.Sleep(time.Second)
	fmt.Println("parked")
	io.Copy(io.Discard, os.Stdin)
	return nil
}

func scan(n int, base string) error {
	var took []float64
	for range n {
		var qr struct{ Ticket string }
		if err := ask("GET", base+"/wechat/getloginqr", &qr); err != nil {
			return err
		}
		ticket := url.QueryEscape(qr.Ticket)
		var answer struct{ Login bool }
		var heard time.Time
		var wg sync.WaitGroup
		wg.Go(func() {
			ask("GET", base+"/wechat/checklogin?wait=25&ticket="+ticket, &answer)
			heard = time.Now()
		})
		time.Sleep(5 * time.Millisecond)
		begun := time.Now()
		if err := ask("POST", base+"/demo/scan?openid=alice&ticket="+ticket, nil); err != nil {
			return err
		}
		wg.Wait()
		if !answer.Login {
			return fmt.Errorf("no login")
		}
		took = append(took, heard.Sub(begun).Seconds()*1000)
	}
	slices.Sort(took)
	fmt.Printf("%.2f %.2f\n", took[n/2], took[n*99/100])
	return nil
}

// push pushes as the simulator does, with the Token of -demo.
func push(n int, pid, base string) error {
	tickets := make(chan string, n)
	for range n {
		var qr struct{ Ticket string }
		if err := ask("GET", base+"/wechat/getloginqr", &qr); err != nil {
			return err
		}
		tickets <- qr.Ticket
	}
	close(tickets)
	before := cpu(pid)
	err := together(32, base, func(conn net.Conn, in *bufio.Reader) error {
		for ticket := range tickets {
			parts := []string{"simulated", strconv.FormatInt(time.Now().Unix(), 10), rand.Text()}
			query := url.Values{"timestamp": {parts[1]}, "nonce": {parts[2]}}
			slices.Sort(parts)
			query.Set("signature", fmt.Sprintf("%x", sha1.Sum([]byte(strings.Join(parts, "")))))
			scene := sha256.Sum256([]byte(ticket))
			body := "<xml><ToUserName><![CDATA[gh_0123456789ab]]></ToUserName>" +
				"<FromUserName><![CDATA[o9AgO5Kd5ggOC-bXrbNODIiE3bGY]]></FromUserName>" +
				"<CreateTime>1714112445</CreateTime>" +
				"<MsgType><![CDATA[event]]></MsgType><Event><![CDATA[SCAN]]></Event><EventKey><![CDATA[" +
				hex.EncodeToString(scene[:16]) + "]]></EventKey><Ticket><![CDATA[gQH47joAAA==]]></Ticket></xml>"
			fmt.Fprintf(conn,
				"POST /wechat/message?%s HTTP/1.1\r\nHost: x\r\nContent-Type: text/xml\r\nContent-Length: %d\r\n\r\n%s",
				query.Encode(), len(body), body)
			reply, err := answer(in)
			if err != nil {
				return err
			}
			if !strings.Contains(reply, "<Content>") {
				return fmt.Errorf("a push logs nobody in: %s", reply)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	fmt.Printf("%.0f\n", float64(n)/(cpu(pid)-before))
	return nil
}

func qr(n int, pid, base string) error {
	before := cpu(pid)
	for range n {
		var qr struct{ QRURL string }
		if err := ask("GET", base+"/wechat/getauthqr", &qr); err != nil {
			return err
		}
		if err := ask("GET", qr.QRURL, nil); err != nil {
			return err
		}
	}
	fmt.Printf("%.2f\n", (cpu(pid)-before)/float64(n)*1000)
	return nil
}

// cpu returns how many seconds of CPU a process has used.
func cpu(pid string) float64 {
	stat, _ := os.ReadFile("/proc/" + pid + "/stat")
	fields := strings.Fields(string(stat))
	user, _ := strconv.Atoi(fields[13])
	system, _ := strconv.Atoi(fields[14])
	return float64(user+system) / 100
}

func ask(method, target string, v any) error {
	req, err := http.NewRequest(method, target, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if v == nil {
		_, err = io.Copy(io.Discard, resp.Body)
		return err
	}
	return json.NewDecoder(resp.Body).Decode(v)
}

func first(addr string, command []string) error {
	cmd := exec.Command(command[0], command[1:]...)
	begun := time.Now()
	if err := cmd.Start(); err != nil {
		return err
	}
	defer cmd.Process.Kill()
	for {
		if conn, err := net.Dial("tcp", addr); err == nil {
			fmt.Fprint(conn, "GET /healthz HTTP/1.0\r\n\r\n")
			if answer, _ := io.ReadAll(conn); len(answer) > 0 {
				fmt.Printf("%.1f\n", time.Since(begun).Seconds()*1000)
				return nil
			}
		}
		time.Sleep(100 * time.Microsecond)
	}
}
